"""The miniature's tasks, the conditions that describe them, their clips as latents, and their base model."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lofa_core import miniature
from lofa_core.conditions import Conditions, Given
from lofa_core.conditions.pose import pose_from_keypoints
from lofa_core.descriptions import BaseDescription, ConditionDescription

from ..backbones import load_vae
from ..config import DataConfig
from ..denoisers import Prompts
from ..over_base import OverBase
from ..told import NOTHING, picture_count, some_kinds
from . import captions, text_encoder, world
from .latents import LatentClips, decode_clips, encode_clips
from .style_pictures import IMAGE_WIDTH, PICTURES, style_states
from .transformer import PromptEncoder, load_prompt_encoder
from .vae import WholeClipVAE
from .world_tasks import WorldTask, split_looks

POSE_SIZE = (world.FRAMES, world.SIZE, world.SIZE)
# Of the tasks drawn where actions and looks are learned: actions alone, looks alone; the rest are both.
_ACTIONS, _LOOKS = 0.45, 0.3


class MiniatureTasks(OverBase):
    """Everything the training stages ask for. `folder` is the run's; what is encoded once is kept in it, or
    in `config.cache`, which several runs can share.

    Text and pose describe an action, style a look. With several kinds, a condition holds any of those that
    have something to say about its task.
    """

    def __init__(self, config: DataConfig, folder: Path, base: Path = miniature.FOLDER):
        super().__init__(base, config.more_bases)
        self.config, self.folder = config, Path(config.cache) if config.cache else folder
        self.kinds = config.conditions
        if "identity" in self.kinds:
            raise ValueError('conditions: this world has no identities; its base "faces" has.')
        self._all_actions, held_out = world.split_actions(config.held_out_tasks, config.seed)
        actions = _spread(self._all_actions, config.training_tasks), held_out
        looks = split_looks(config.held_out_looks, config.seed)
        parts = []
        for some_actions, some_looks in zip(actions, looks, strict=True):
            tasks = [WorldTask(action) for action in some_actions] if self._learns_actions else []
            parts.append(
                tasks + ([WorldTask(look=look) for look in some_looks] if self._learns_looks else [])
            )
        self.training, self.held_out = parts
        self._actions, self._looks = actions[0], looks[0]

    @property
    def _learns_actions(self) -> bool:
        return "text" in self.kinds or "pose" in self.kinds

    @property
    def _learns_looks(self) -> bool:
        return "style" in self.kinds

    def sorts(self) -> list[list[WorldTask]]:
        """The training tasks that are actions, and those that are looks."""
        actions = [task for task in self.training if task.action is not None]
        return [some for some in (actions, self.training[len(actions) :]) if some]

    @cached_property
    def encoder(self) -> PromptEncoder:
        return load_prompt_encoder(self.base)

    # ------------------------------------------------------------
    # Clips

    @cached_property
    def clips(self) -> LatentClips:
        """Latents of the training actions in random looks, drawn and encoded once."""
        path = self.folder / "latents.pt"
        if not path.exists():
            tasks = [WorldTask(action) for action in self._all_actions]
            encoded = encode_clips(load_vae(self.base), tasks, self.config.clips_per_task, self.config.seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            encoded.save(path)
        return LatentClips.load(path)

    @cached_property
    def _clips_of(self) -> dict[WorldTask, Tensor]:
        return {}

    def clips_of(self, task: WorldTask) -> Tensor:
        """Indices into `clips`."""
        if task not in self._clips_of:
            self._clips_of[task] = self.clips.of(task)
        return self._clips_of[task]

    def latents_of(self, task: WorldTask) -> Tensor:
        """All training latents [n, C, T, H, W] of a task."""
        return self.clips.latents[self.clips_of(task)]

    def some_latents(self, task: WorldTask, count: int, rng: np.random.Generator) -> Tensor:
        """`count` of them, drawn with replacement."""
        clips = self.clips_of(task)
        return self.clips.latents[clips[torch.from_numpy(rng.integers(len(clips), size=count))]]

    def held_out_clips(self, each: int, offset: int = 0, tasks: list[WorldTask] | None = None) -> LatentClips:
        """Real latents of the held-out tasks, from seeds that training never used; another set for each
        `offset`.
        """
        tasks = self.held_out if tasks is None else tasks
        return encode_clips(load_vae(self.base), tasks, each, self.config.seed + 90_000 + offset)

    def held_out_latents(self, each: int) -> Callable[[WorldTask], Tensor]:
        """Those that the held-out tasks' own LoRAs are trained on: `each` of every task."""
        encoded = self.held_out_clips(each, offset=2)
        rows = {task: slice(i * each, (i + 1) * each) for i, task in enumerate(self.held_out)}
        return lambda task: encoded.latents[rows[task]]

    def pictures(self, latents: Tensor) -> np.ndarray:
        """Unit latents [N, C, T, H, W] -> frames uint8 [N, T, H, W, 3]."""
        return decode_clips(WholeClipVAE(load_vae(self.base)), latents)

    def loss_weights(self, task: WorldTask) -> Tensor:
        """Weights [C, T, H, W] of a loss on a task's latents: larger where actions show, for a task with one;
        looks show everywhere.
        """
        return self._where_actions_show if task.action else torch.ones_like(self._where_actions_show)

    @cached_property
    def _where_actions_show(self) -> Tensor:
        return self.clips.action_weights()

    # ------------------------------------------------------------
    # Tasks and what is said of them

    def draw_task(self, rng: np.random.Generator) -> WorldTask:
        """A training task. Where actions and looks are learned, a fourth of them is both at once."""
        if not (self._learns_actions and self._learns_looks):
            return self.training[rng.integers(len(self.training))]
        drawn = rng.random()
        if drawn < _LOOKS:
            return WorldTask(look=self._looks[rng.integers(len(self._looks))])
        action = WorldTask(self._actions[rng.integers(len(self._actions))])
        if drawn < _LOOKS + _ACTIONS:
            return action
        clips = self.clips_of(action)
        look = self.clips.look(int(clips[rng.integers(len(clips))]))
        return WorldTask(action.action, look) if look in self._training_looks else action

    @cached_property
    def _training_looks(self) -> set[world.Look]:
        return set(self._looks)

    def condition(self, task: WorldTask, rng: np.random.Generator) -> dict[str, Any]:
        """A training condition of a task, drawn: a sentence, a pose document, indices of style pictures."""
        if self.kinds == ("text",):
            return {"text": self.sentence(task, rng)}
        if len(self.kinds) > 1 and rng.random() < NOTHING:
            return {}
        told: dict[str, Any] = {}
        if task.action is not None:
            for kind in some_kinds([kind for kind in ("text", "pose") if kind in self.kinds], rng):
                told[kind] = self.sentence(task, rng) if kind == "text" else self.pose(task, rng)
        if task.look is not None and "style" in self.kinds:
            picks = rng.integers(PICTURES, size=picture_count(rng))
            told["style"] = [(task.look, int(pick)) for pick in picks]
        return told

    def plain_condition(self, task: WorldTask, rng: np.random.Generator) -> dict[str, Any]:
        """All that can be said of a task in training's words, with one picture."""
        told: dict[str, Any] = {}
        if task.action is not None and "text" in self.kinds:
            told["text"] = self.plain_sentence(WorldTask(task.action), rng)
        if task.action is not None and "pose" in self.kinds:
            told["pose"] = self.pose(task, rng)
        if task.look is not None and "style" in self.kinds:
            told["style"] = [(task.look, 0)]
        return told

    def conditions(self, told: list[dict[str, Any]]) -> Conditions:
        """What `condition` drew for B tasks, encoded."""
        found: dict[str, Given] = {}
        for kind in self.kinds:
            given = [one.get(kind) for one in told]
            if all(one is None for one in given):
                continue
            if kind == "text":
                values = self.encoder([one or "" for one in given])[:, :-1]
            elif kind == "pose":
                nothing = torch.zeros(1, 3, *POSE_SIZE)
                values = torch.cat([nothing if one is None else drawn_pose(one) for one in given])
            else:
                rows = [self.style_rows(one) if one else torch.zeros(1, IMAGE_WIDTH) for one in given]
                values = pad_sequence(rows, batch_first=True)
            strength = torch.tensor([float(one is not None) for one in given])
            found[kind] = Given(values, strength if len(self.kinds) > 1 else None)
        if not found:  # nothing is told of any of them
            kind = self.kinds[0]
            return self._silence(kind, len(told))
        return found

    def _silence(self, kind: str, count: int) -> Conditions:
        values = self.conditions([{kind: self._anything[kind]}])[kind].values
        return {kind: Given(values.expand(count, *values.shape[1:]), torch.zeros(count))}

    @cached_property
    def _anything(self) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        task = WorldTask(self._actions[0], self._looks[0])
        return {
            "text": self.coarse_prompt, "pose": self.pose(task, rng), "style": [(self._looks[0], 0)]
        }  # fmt: skip

    def descriptions(self) -> tuple[BaseDescription, tuple[ConditionDescription, ...]]:
        """What a hypernetwork trained on these tasks is for."""
        known = {
            "text": ConditionDescription("text", text_encoder.WIDTH, captions.known_words(), captions.COARSE),
            "pose": ConditionDescription("pose", 3, coarse_prompt=captions.COARSE, size=POSE_SIZE),
            "style": ConditionDescription("style", IMAGE_WIDTH, coarse_prompt=captions.COARSE),
        }
        return self.base_description(), tuple(known[kind] for kind in self.kinds)

    def pose(self, task: WorldTask, rng: np.random.Generator) -> list[dict]:
        """The skeletons of a new clip of the task's action, as POSE_KEYPOINT."""
        return world.pose_of_clip(task.action, rng)

    @cached_property
    def _style_states(self) -> dict[world.Look, Tensor]:
        return style_states(self.base, self._all_actions, self.folder / "style_states.pt")

    def style_rows(self, pictures: list[tuple[world.Look, int]]) -> Tensor:
        """The image encoder's states of some pictures of looks, one picture after the other [n S, d]."""
        return torch.cat([self._style_states[look][pick].float() for look, pick in pictures])

    def sentence(self, task: WorldTask, rng: np.random.Generator) -> str:
        """A training sentence: mostly whole, some with parts left out or clothes and a place named."""
        keep = 1.0 if rng.random() < 0.8 else 0.8
        look = world.random_look(rng) if rng.random() < 0.3 else None
        return captions.fine_caption(task.action, look, rng, keep=keep)

    def plain_sentence(self, task: WorldTask, rng: np.random.Generator) -> str:
        """A whole sentence in training's wordings about what the task fixes, and nothing else."""
        return captions.fine_caption(task.action, task.look, rng)

    def reserved_sentence(self, task: WorldTask, rng: np.random.Generator) -> str:
        """A sentence in wordings and a plan that training never used."""
        return captions.fine_caption(task.action, task.look, rng, wordings="reserved", plans="reserved")

    @property
    def coarse_prompt(self) -> str:
        return captions.COARSE

    def prompts(self, sentences: list[str]) -> Prompts:
        return Prompts(self.encoder(sentences))

    def coarse(self) -> Prompts:
        """The coarse prompt, one row."""
        return self.prompts([self.coarse_prompt])


def _spread(actions: list[world.Action], count: int) -> list[world.Action]:
    """`count` of them, evenly spread; those of half as many are among them. 0: all."""
    if not 0 <= count <= len(actions):
        raise ValueError(f"training_tasks = {count}: expected 0 to {len(actions)} actions.")
    return [actions[i * len(actions) // count] for i in range(count)] if count else actions


def drawn_pose(document: list[dict]) -> Tensor:
    """The skeletons as the hypernetwork looks at them, [1, 3, T, H, W] in 0..1."""
    return pose_from_keypoints(document, *POSE_SIZE)
