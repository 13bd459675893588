"""Many small runs of one configuration, each with something changed, and what each does on held-out tasks.

    python -m training.experiments --config training/configs/experiments.toml --seeds 0
        every experiment of the file with this seed, in its order; what is done stays done
    python -m training.experiments --config ... --only "random constants" "Text-to-LoRA MLP"
        some of them
    python -m training.experiments --config ... --again
        judge anew what was trained here, when there is more to measure

Runs lie under the file's `out`, figures under `results`: one JSON an experiment, all its seeds in it, which
`python -m training.results` turns into tables. Experiments of one seed build on each other's Stage I; several
seeds can run at once.
"""

import argparse
import fnmatch
import json
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lofa_core.checkpoint import load_generator, load_hypernetwork, save_hypernetwork
from lofa_core.console import complain
from lofa_core.hypernetwork import Hypernetwork
from lofa_core.whole_files import write_whole

from . import lora_diffusion
from .baselines.simple import mean_lora, nearest_lora, ridge_lora
from .config import EvaluationConfig, fill, load_config, read_toml
from .evaluate import held_out_conditions, rounded
from .factors import Factors
from .judge import Judge, Method, agreement, predicted_factors, response_figures
from .looks import Predictor
from .loop import SHIPPED, Run
from .lora_dataset import LoRADataset
from .machine import device_name
from .miniature import evaluator
from .miniature.tasks import MiniatureTasks

PARTS = ("lora-dataset", "stage1", "stage2", "end-to-end", "text-to-lora", "lora-diffusion")


@dataclass(frozen=True)
class Experiment:
    """What is run, and what is changed for it.

    parts: of train.py, in order; the last one makes what is judged (of Stage I alone, its maps). Without any,
    it is a method that needs no training, by its name. stage1_of: the experiment whose Stage I it starts
    from. prompts: under which the LoRAs are judged. bases: folders of other base models that they are judged
    on as well. again: experiments (or patterns: "per-task LoRA, again*") that train the held-out tasks' LoRAs
    once more, which Stage I's maps are compared with as well.
    """

    parts: tuple[str, ...] = ()
    set: tuple[str, ...] = ()
    stage1_of: str = ""
    prompts: tuple[str, ...] = ("coarse",)
    bases: tuple[str, ...] = ()
    again: tuple[str, ...] = ()

    def __post_init__(self):
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise ValueError(f"parts = {unknown}: expected some of {', '.join(PARTS)}.")


@dataclass(frozen=True)
class Plan:
    """An experiments file: the configuration all start from, what they all change, and where things go."""

    config: str
    out: str
    results: str
    set: tuple[str, ...]
    experiments: dict[str, Experiment]

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Raises ValueError naming the file, the experiment and the key."""
        values = read_toml(path)
        found: dict[str, Experiment] = {}
        for name, given in values.pop("experiment", {}).items():
            experiment = fill(Experiment, given, f"{path} [experiment.{name!r}]")
            wrong = [
                f"again = {pattern!r}" for pattern in experiment.again if not fnmatch.filter(found, pattern)
            ]
            if experiment.stage1_of not in ("", *found):
                wrong.append(f"stage1_of = {experiment.stage1_of!r}")
            if wrong:
                raise ValueError(f"{path} [experiment.{name!r}]: {wrong[0]} is no experiment above it.")
            again = [other for other in found if any(fnmatch.fnmatch(other, one) for one in experiment.again)]
            found[name] = replace(experiment, again=tuple(again))
        if unknown := values.keys() - {"config", "out", "results", "set"}:
            raise ValueError(
                f"{path}: unknown key {min(unknown)!r}. Known here: config, out, results, set, experiment."
            )
        for key in ("config", "out", "results"):
            if not isinstance(values.get(key), str):
                raise ValueError(f"{path}: {key} is missing: name a file or folder.")
        return cls(
            str(path.parent / values["config"]),
            values["out"],
            values["results"],
            tuple(values.get("set", ())),
            found,
        )

    def described(self, name: str) -> dict[str, Any]:
        """What an experiment's figures rest on: they count only for a plan that says the same."""
        experiment = self.experiments[name]
        return {
            "name": name,
            "parts": list(experiment.parts),
            "stage1_of": experiment.stage1_of,
            "set": list(experiment.set),
            "common": list(self.set),
        }


def slug(name: str) -> str:
    """A name as files have it."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


class Seed:
    """All experiments of one seed: the run of each, and one judge for all."""

    def __init__(self, plan: Plan, seed: int, console: Console):
        self.plan, self.seed, self.console = plan, seed, console
        self._judges: dict[Path, Judge] = {}

    def folder(self, name: str) -> Path:
        return Path(self.plan.out) / f"{slug(name)}-{self.seed}"

    def run(self, name: str) -> dict[str, Any]:
        """Train what is not trained yet, and judge it."""
        experiment = self.plan.experiments[name]
        run = Run(self._config(name, experiment), self.console)
        fresh, started = not any(run.folder.iterdir()), time.perf_counter()
        if experiment.stage1_of:
            self._take_stage1(experiment.stage1_of, run)
        made = [getattr(run, part.replace("-", "_"))() for part in experiment.parts]
        trained = time.perf_counter() - started
        found = self._judged(name, experiment, run)
        if experiment.parts and fresh:  # else some of it was done before
            found["training_seconds"] = trained
            if experiment.parts[-1] == "lora-dataset":
                loras = sum(len(summary.done) for summary in made[-1])
                found |= {"seconds": trained / loras} if loras else {}  # else another seed's
        return found

    def _take_stage1(self, name: str, run: Run) -> None:
        """Another experiment's Stage I, under a Stage II of this one's design. It is trained where it is not
        there: its figures may be older than this machine's runs.
        """
        network, path = run.new_network(), self.folder(name) / "stage1.safetensors"
        if not path.exists():
            Run(self._config(name, self.plan.experiments[name]), self.console).stage1()
        other = load_hypernetwork(path)
        network.stage1.load_state_dict(other.stage1.state_dict())
        save_hypernetwork(network, run.folder / "stage1.safetensors", dtype=torch.float32)

    def _config(self, name: str, experiment: Experiment):
        sections = ("stage1", "stage2", "end_to_end", "text_to_lora", "lora_vae", "lora_diffusion")
        seeds = [f"{section}.seed={self.seed}" for section in sections]
        seeds.append(f"evaluation.seed={1234 + self.seed}")
        changes = [*self.plan.set, *seeds, f'out="{self.folder(name)}"', *experiment.set]
        return load_config(Path(self.plan.config), changes)

    def judge(self, data: MiniatureTasks, settings: EvaluationConfig) -> Judge:
        """One for each base model: the held-out tasks are the same for all experiments."""
        if data.base not in self._judges:
            self._judges[data.base] = Judge(data, data.held_out, settings, evaluator.load())
        return self._judges[data.base]

    def _judged(self, name: str, experiment: Experiment, run: Run) -> dict[str, Any]:
        torch.set_num_threads(1)
        judge = self.judge(run.data, run.config.evaluation)
        known, wanted = run.packed("training"), run.packed("held_out")
        told = held_out_conditions(run.data, judge, run.data.kinds[0])
        found: dict[str, Any] = {}
        if experiment.parts == ("stage1",):
            stage1 = load_hypernetwork(run.folder / "stage1.safetensors")
            again = self._again(experiment)
            figures = response_figures(
                stage1, run.data, told, known, wanted, run.config.stage1.threshold, again
            )
            maps = {name: value for name, value in figures.items() if not name.startswith("stage2")}
            return {"rows": {}, "response": maps, "loras": len(known.tasks)}
        started = time.perf_counter()
        last = experiment.parts[-1] if experiment.parts else ""
        factors: Factors | None = None
        network: Predictor | None = None
        if last in ("stage2", "end-to-end"):
            network = load_hypernetwork(run.folder / "hypernetwork.safetensors")
        elif last == "text-to-lora":
            network = run.baselines()["Text-to-LoRA MLP"]
        if network is not None:
            factors = predicted_factors(network, run.data, told)
            found["seconds"] = (time.perf_counter() - started) / len(told)
            found["parameters"] = sum(p.numel() for p in network.parameters())
        elif last == "lora-diffusion":
            generator = load_generator(run.folder / lora_diffusion.FILE)
            factors = lora_diffusion.drawn_factors(generator, run.data, told, self.seed)
            found["seconds"] = (time.perf_counter() - started) / len(told)
            found["parameters"] = sum(p.numel() for p in generator.parameters())
            found["spread"] = lora_diffusion.spread(generator, run.data, told, wanted.loras)
        elif last == "lora-dataset":
            factors = wanted.loras
            if run.config.lora.repeat:
                of_all, first = (
                    LoRADataset.load(SHIPPED / f"loras_{split}.safetensors").of(tasks)
                    for split, tasks in (("training", run.data.training), ("held_out", wanted.tasks))
                )
                found["response"] = agreement(run.data, factors, of_all, first)
        else:
            factors = self._untrained(name, known, wanted)
        if name == "real clips":
            return found | {"rows": {"coarse": judge.score(judge.real.latents.float())}}
        rows = {prompt: judge.measure(Method(name, factors, prompt)) for prompt in experiment.prompts}
        found["rows"] = rows
        for base in map(Path, experiment.bases):
            data = MiniatureTasks(run.config.data, run.folder, base)
            own = factors if network is None else predicted_factors(network, data, told)
            method = Method(name, own)
            found.setdefault("bases", {})[base.name] = self.judge(data, run.config.evaluation).measure(method)
        if isinstance(network, Hypernetwork) and run.config.stage2.from_stage1 and last == "stage2":
            threshold = run.config.stage1.threshold
            again = self._again(experiment)
            found["response"] = response_figures(network, run.data, told, known, wanted, threshold, again)
        return found

    def _again(self, experiment: Experiment) -> list[Factors]:
        """The held-out tasks' LoRAs of other trainings, which are done where they are not there."""
        found = []
        for name in experiment.again:
            run = Run(self._config(name, self.plan.experiments[name]), self.console)
            run.lora_dataset()
            found.append(run.packed("held_out").loras)
        return found

    @staticmethod
    def _untrained(name: str, known, wanted) -> Factors | None:
        """LoRAs of a method that is not trained by gradients; None for the base model itself. Behind a comma
        a name says on which bases it is judged.
        """
        indices = known.indices(), wanted.indices()
        match name.partition(",")[0]:
            case "mean LoRA":
                return mean_lora(known.loras, len(wanted.tasks))
            case "nearest LoRA":
                return nearest_lora(known.loras, *indices)
            case "ridge regression":
                return ridge_lora(known.loras, *indices)
            case "per-task LoRA":  # those that the configuration has trained, or the shipped ones
                return wanted.loras
            case "base" | "real clips":
                return None
        raise ValueError(
            f"[experiment.{name!r}] has no parts: only base, real clips, mean LoRA, nearest LoRA, ridge "
            "regression and per-task LoRA need no training."
        )


def keep(results: Path, described: dict[str, Any], seed: int, found: dict[str, Any]) -> None:
    """Add a seed's figures to the experiment's file. Figures of one described otherwise are put aside, as
    `.outdated`.
    """
    path = results / f"{slug(described['name'])}.json"
    before = _kept(path, described)
    if path.exists() and not before:
        path.replace(path.with_suffix(".outdated"))
    seeds = before | {str(seed): rounded(found)}
    whole = described | {"seeds": {key: seeds[key] for key in sorted(seeds, key=int)}}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(whole, indent=1) + "\n")


def figures_of(results: Path, described: dict[str, Any], seed: int) -> dict[str, Any]:
    """This seed's figures, of the experiment as it is now; empty where there are none."""
    return _kept(results / f"{slug(described['name'])}.json", described).get(str(seed), {})


def _kept(path: Path, described: dict[str, Any]) -> dict[str, Any]:
    if not path.exists():
        return {}
    whole = json.loads(path.read_text(encoding="utf-8"))
    seeds = whole.pop("seeds")
    return seeds if whole == described else {}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="training/configs/experiments.toml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these experiments alone")
    parser.add_argument("--again", action="store_true", help="judge those with figures anew as well")
    chosen = parser.parse_args()
    console = Console(stderr=True, highlight=False)
    try:
        plan = Plan.load(chosen.config)
        names = chosen.only or list(plan.experiments)
        if unknown := [name for name in names if name not in plan.experiments]:
            raise ValueError(f"--only {unknown}: expected some of {'; '.join(plan.experiments)}.")
        results = Path(plan.results)
        for number in chosen.seeds:
            seed = Seed(plan, number, console)
            for name in names:
                described = plan.described(name)
                before = figures_of(results, described, number)
                if before and not chosen.again:
                    continue
                # What only a training can tell, such as its seconds, stays as it was.
                found = before | seed.run(name) | {"machine": device_name(torch.device("cpu"))}
                keep(results, described, number, found)
                figures = found["rows"].get("coarse") or found["response"]
                row = {key: round(value, 4) for key, value in figures.items()}
                console.print(f"{name}, seed {number}: {row}", soft_wrap=True)
    except (ValueError, OSError) as error:
        complain(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
