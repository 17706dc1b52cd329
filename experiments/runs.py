"""The runs of tiny_paper.py: what Tables 1-3, the switches and the reviewers' questions are made of.

A run's name says what it is: "sft-28>grpo" is 28 steps of SFT, then RL for the rest; "srft weak" is SRFT on
weak demonstrations; "srft --loss_norm token" is SRFT with that flag. A part is a dictionary, name -> Run.
"""
from dataclasses import dataclass

STEPS, STAGE = 40, 28              # of every paradigm; of SFT in sequences: 70 %, as 350 of the paper's 500
REST = STEPS - STAGE
GRID, BEYOND = (1e-4, 3e-4, 1e-3, 3e-3), (3e-5, 1e-2)       # learning rates; one more beyond an edge
TUNING_SEED = 100


@dataclass(frozen=True)
class Run:
    """One run of srft.py. start: the run whose hf/ it starts from; lr: the run whose tuned rate it takes.

    Its repr() stands in each result's config.json: a result counts as long as that is the run's definition.
    """
    method: str
    steps: int = STEPS
    start: str = ""
    flags: tuple = ()
    lr: str = ""


def sequence(first, second, switch):
    """The two runs of a sequence that switches after `switch` steps; the first has its method's own rate."""
    return {f"{first}-{switch}": Run(first, switch, lr=first),
            f"{first}-{switch}>{second}": Run(second, STEPS - switch, f"{first}-{switch}")}


def variants(methods, suffix, *flags, tuned=True):
    """The same methods with these flags, each tuned itself, or by the rate of its method without them."""
    runs = {}
    for name in methods:
        runs[f"{name} {suffix}"] = Run(name, flags=flags, lr="" if tuned else name)
    return runs


TABLE1 = {
    "sft": Run("sft"),
    "grpo": Run("grpo"),
    **sequence("sft", "grpo", STAGE),
    **sequence("grpo", "sft", REST),
    f"grpo-{REST}>sft_kl": Run("sft_kl", STAGE, f"grpo-{REST}", ("--reference", "tiny")),
    # both stages in full, twice the budget: the paper speaks of SFT after RL that has converged
    "sft>grpo": Run("grpo", start="sft"),
    "grpo>sft": Run("sft", start="grpo"),
    "grpo>sft_kl": Run("sft_kl", start="grpo", flags=("--reference", "tiny"))}
TABLE2 = {
    **{name: Run(name) for name in ("sft_kl", "sft+rl", "luffy", "relift", "srft")},
    **sequence("sft", "grpo", 12),
    **sequence("sft", "grpo", 20),
    "grpo-truncated": Run("grpo", flags=("--entropy_quantile", "0.8"), lr="grpo")}
TABLE3 = {
    "srft-w_sft-1": Run("srft", flags=("--w_sft", "one")),
    "srft-w_rl-1": Run("srft", flags=("--w_rl", "one"))}
SWITCHES = {f"srft {flags}": Run("srft", flags=tuple(flags.split()), lr="srft") for flags in (
    "--w_sft constant --w_rl constant", "--w_sft_sign 1", "--eq12_advantage", "--demo_shaping 0.1",
    "--loss_norm token", "--entropy_level token", "--entropy_level batch", "--demo_in_group replaces",
    "--no-std_in_advantage")}
REVIEWS = {
    **{name: TABLE2[name] for name in ("sft-12", "sft-12>grpo")},
    "sft-12>srft": Run("srft", 28, "sft-12"),
    **variants(("sft", "sft+rl", "luffy", "srft"), "weak", "--data", "out/tiny_paper/weak.jsonl",
               tuned=False)}
SECOND_FAMILY = variants(("sft", "grpo", "sft+rl", "srft"), "qwen3", "--model", "experiments/qwen3")
# What Fig. 3 measures distances to, in the place of DeepSeek-R1 and QwQ-32B: experts, each in its own style.
EXPERTS = {
    f"expert-{style}": Run("sft", 2 * STEPS, flags=("--data", f"out/tiny_paper/{style}.jsonl"), lr="sft")
    for style in ("careful", "plain")}

DRAWN = TABLE1 | TABLE2 | TABLE3                    # evaluated along the way; of others only the end counts
RUNS = DRAWN | SWITCHES | REVIEWS | SECOND_FAMILY | EXPERTS
PARTS = {"table1": TABLE1, "table2": TABLE1 | TABLE2, "table3": {"srft": TABLE2["srft"], **TABLE3},
         "switches": {"srft": TABLE2["srft"], **SWITCHES},
         "reviews": TABLE1 | TABLE2 | REVIEWS | SECOND_FAMILY}
SHOWN = {"SFT": "sft", "RL": "grpo", "SRFT": "srft"}    # in Fig. 2 and 3
TRAJECTORY = (f"sft-{STAGE}", f"sft-{STAGE}>grpo")      # Fig. 3 shows this one, too
