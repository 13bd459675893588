"""The tables of the experiments, as data: which experiment stands in which line, beside which of the
paper's figures.
"""

from dataclasses import dataclass

PUBLISHED = "reconstruction and diffusion"  # the losses of eq. 8
BASE, LOFA, YARDSTICK, AGAIN = "base", "LoFA", "per-task LoRA", "per-task LoRA, again"
BETTER = "LoFA, better Stage I"  # of 128 LoRAs, whose A and B it learns as well
MAPS_ALONE, MOST = "LoFA, Stage I of 128 LoRAs", "LoFA, Stage I of 448 LoRAs"
MAPS_LONGER = f"{MAPS_ALONE}, for as long"
# Training steps of a per-task LoRA, and the experiment: the configuration's own has 120.
BUDGETS = {
    steps: YARDSTICK if steps == 120 else f"{YARDSTICK}, {steps} steps" for steps in (30, 60, 120, 250)
}


@dataclass(frozen=True)
class Line:
    """One row of a table: an experiment under a prompt, and what the paper has in that place."""

    label: str
    experiment: str
    prompt: str = "coarse"
    paper: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A title, what to know of it, the headings of the paper's columns, and the rows."""

    title: str
    words: str
    paper: tuple[str, ...]
    lines: tuple[Line, ...]
    against_lofa: bool = True  # with columns of the difference from LoFA, seed by seed


@dataclass(frozen=True)
class Choice:
    """Something that a design decides, the experiment that decides so, and what else was tried."""

    what: str
    others: tuple[Line, ...]
    chosen: str = LOFA
    # The chosen training in all but little: both share most of their noise, and how far they are apart says
    # nothing of how far other trainings would be.
    near: bool = False


MEASURES: dict[str, tuple[str, int]] = {
    "joint": ("all factors right", 3),
    "mean_accuracy": ("factors right", 3),
    "frechet": ("Frechet distance", 2),
    "flow_matching": ("flow matching", 4),
    "motion": ("motion", 4),
    "diversity": ("diversity", 2),
}
FACTOR = "right: "  # before a factor's name, in a run's figures
_FVD_DD = ("paper: FVD", "paper: dynamic degree")

METHODS = Table(
    "Methods (the paper's tables 1 and 4)",
    "The paper's columns are its full-size text-to-action figures.",
    _FVD_DD,
    (
        Line("base", "base"),
        Line("base, fine prompt", "base", "fine"),
        Line("mean LoRA", "mean LoRA"),
        Line("nearest LoRA", "nearest LoRA"),
        Line("ridge regression", "ridge regression"),
        Line("Text-to-LoRA MLP, reconstruction", "Text-to-LoRA MLP, reconstruction alone"),
        Line("Text-to-LoRA MLP, our losses", "Text-to-LoRA MLP, our losses"),
        Line("end to end, diffusion (HM-CFG)", "end to end, diffusion alone"),
        Line("end to end, distillation", "end to end, distillation"),
        Line("LoRA Diffusion, one draw", "LoRA Diffusion"),
        Line("without response", "without response", paper=("665.4", "0.2117")),
        Line("lightweight Stage I", "lightweight Stage I", paper=("655.1", "0.2090")),
        Line("Stage I predicts the LoRA", "Stage I predicts the LoRA"),
        Line("condition as input", "condition as input", paper=("653.7", "0.2058")),
        Line("random constants as input", "random constants as input"),
        Line("LoFA from a better Stage I", BETTER),
        Line("LoFA", LOFA, paper=("589.8", "0.2283")),
        Line("LoFA, fine prompt", LOFA, "fine"),
        Line("Text-to-LoRA MLP, twice the steps", "Text-to-LoRA MLP, 1200 steps"),
        Line("LoFA, twice the steps", "LoFA, 1200 steps"),
        Line("LoFA, twice the steps, fine prompt", "LoFA, 1200 steps", "fine"),
        Line("per-task LoRA", YARDSTICK),
        Line("per-task LoRA, fine prompt", YARDSTICK, "fine"),
        Line("real clips", "real clips"),
    ),
)
TABLES = (
    METHODS,
    Table(
        "Losses of Stage II",
        "All start from the same Stage I. As published is reconstruction and diffusion (eq. 8), where every "
        "task of a step has a LoRA of its own: 32 tasks here, or 128. The last three rows draw from all 448.",
        (),
        (
            Line("reconstruction alone", "reconstruction alone"),
            Line("reconstruction and diffusion (as published)", PUBLISHED),
            Line("reconstruction and diffusion, 128 LoRAs", f"{PUBLISHED}, 128 LoRAs"),
            Line("diffusion alone", "diffusion alone"),
            Line("distillation alone", "distillation alone"),
            Line("all three (ours)", LOFA),
        ),
    ),
    Table(
        "LoRAs that Stage I learns from",
        "Stage II's own 32 LoRAs and its steps are the same in each row. Stage I has 200 steps in the first, "
        "600 in the second, 1,200 of all layers at once in the third and fourth, 2,400 in the last.",
        (),
        (
            Line("32, by their maps", LOFA),
            Line("128, by their maps", MAPS_ALONE),
            Line("128, by their maps, for longer", MAPS_LONGER),
            Line("128, A and B as well", BETTER),
            Line("448, A and B as well", MOST),
        ),
    ),
    Table(
        "Threshold of the response map (table 6)",
        "",
        _FVD_DD,
        (
            Line("0.01", "threshold 0.01", paper=("634.7", "0.2219")),
            Line("0.015", "threshold 0.015", paper=("602.9", "0.2245")),
            Line("0.02", LOFA, paper=("589.8", "0.2283")),
            Line("0.025", "threshold 0.025", paper=("597.1", "0.2253")),
            Line("0.03", "threshold 0.03", paper=("622.5", "0.2197")),
        ),
    ),
    Table(
        "Blocks of Stage II that attend to Stage I's features (tables 7 and 8)",
        "The miniature has three blocks, the paper's network eight: its figures (FVD) are 660.1 for the "
        "first two, 680.9 for all eight, 612.2 for the 4th and 6th, 589.8 for the 4th and 8th.",
        (),
        (
            Line("none (Stage I's weights to start from alone)", "features nowhere"),
            Line("1st", "features in block 0"),
            Line("1st and 2nd", "features in blocks 0 and 1"),
            Line("2nd and 3rd", "features in blocks 1 and 2"),
            Line("1st and 3rd (ours)", LOFA),
            Line("all", "features in every block"),
        ),
    ),
    Table(
        "Tasks that are learned from (figure 8)",
        "",
        (),
        tuple(
            Line(f"{method}, {count}", f"{method}, {count} tasks")
            for method in ("LoFA", "without response", "Text-to-LoRA MLP")
            for count in (32, 64, 128, 256)
        )
        + (
            Line("LoFA, all 448", LOFA),
            Line("without response, all 448", "without response"),
            Line("Text-to-LoRA MLP, all 448", "Text-to-LoRA MLP, our losses"),
        ),
    ),
    Table(
        "Per-task LoRA, by its training steps",
        "The yardstick above has 120.",
        (),
        tuple(
            Line(f"{steps} steps, {prompt} prompt", name, prompt)
            for steps, name in BUDGETS.items()
            for prompt in ("coarse", "fine")
        )
        + (Line("120 steps again, other clips and noise", AGAIN),),
        against_lofa=False,
    ),
)

# The paper's, but for distillation and the other Stage I.
CHOICES = (
    Choice(
        "a response map first",
        (
            Line("one stage", "without response"),
            Line("Stage I predicts the LoRA", "Stage I predicts the LoRA"),
            Line("so does a Stage I of one block", "lightweight Stage I"),
        ),
    ),
    Choice(
        "Stage I of 32 LoRAs, by their maps",
        (
            Line("of 128, by their maps", MAPS_ALONE),
            Line("of 128, by their maps, for longer", MAPS_LONGER),
            Line("of 128, A and B as well", BETTER),
            Line("of 448, A and B as well", MOST),
        ),
    ),
    Choice(
        "the base's weights as input",
        (
            Line("the condition", "condition as input"),
            Line("random constants", "random constants as input"),
        ),
    ),
    Choice(
        "threshold 0.02",
        tuple(Line(value, f"threshold {value}") for value in ("0.01", "0.015", "0.025", "0.03")),
        near=True,
    ),
    Choice(
        "Stage I's features in the 1st and 3rd block",
        (
            Line("in none", "features nowhere"),
            Line("1st", "features in block 0"),
            Line("1st and 2nd", "features in blocks 0 and 1"),
            Line("2nd and 3rd", "features in blocks 1 and 2"),
            Line("all", "features in every block"),
        ),
        near=True,
    ),
    Choice(
        "reconstruction and diffusion (eq. 8)",
        (
            Line("reconstruction alone (eq. 6)", "reconstruction alone"),
            Line("both, of 128 tasks in place of 32", f"{PUBLISHED}, 128 LoRAs"),
            Line("diffusion alone, of all 448 tasks", "diffusion alone"),
        ),
        PUBLISHED,
    ),
    Choice(
        "many tasks, 448",
        tuple(Line(f"{count}", f"LoFA, {count} tasks") for count in (256, 128, 64, 32)),
    ),
    Choice(
        "distillation beside the paper's losses (ours)",
        (
            Line("the paper's, of the 32 tasks with LoRAs", PUBLISHED),
            Line("diffusion alone", "diffusion alone"),
            Line("distillation alone", "distillation alone"),
        ),
    ),
    *(
        Choice(
            f"distillation beside the paper's losses, of the same {count} tasks",
            (Line("the paper's", f"{PUBLISHED}{of}"),),
            f"LoFA, {count} tasks",
        )
        for count, of in ((32, ""), (128, ", 128 LoRAs"))
    ),
    Choice(
        "a transformer over the weights' rows",
        (Line("an MLP, our losses", "Text-to-LoRA MLP, our losses"),),
    ),
)
