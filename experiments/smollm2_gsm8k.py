"""The comparison on a pretrained model: SmolLM2-135M on GSM8K and its solutions as demonstrations; one seed.

    python experiments/smollm2_gsm8k.py --model DIR --train FILE --test FILE           # one GPU
    python experiments/smollm2_gsm8k.py --model DIR --train FILE --test FILE --cpu     # a night on 2 cores

The files have the columns problem, answer and solution; the model is any chat model that one card trains.
SRFT, GRPO, SFT, SFT+RL and SFT->RL (70 % + 30 %) get the same number of steps and of prompts, the same
rollouts where they have any, and one learning rate, tuned for none of them (SFT: linear schedule, as in App.
B). A run that was stopped goes on from its newest checkpoint. In the end come a table and the figures
out/smollm2/fig6.png (dynamics) and fig5.png (efficiency). Math-Verify takes its answer from anywhere in the
text here (--no-strict_box): the base model writes no box, and RL alone would never see a reward.
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from support.intervals import number_in, positive  # noqa: E402
from support.runlog import read_rows  # noqa: E402

# Paradigm: its stages, (method, share of the steps).
RUNS = {"sft": [("sft", 1.0)], "grpo": [("grpo", 1.0)], "sft+rl": [("sft+rl", 1.0)], "srft": [("srft", 1.0)],
        "sft->rl": [("sft", 0.7), ("grpo", 0.3)]}
GPU = dict(steps=200, prompts_per_step=64, n_rollouts=8, max_response_tokens=400, micro_batch_tokens=32768,
           lr=5e-6, eval_every=20, save_every=20)
CPU = dict(steps=20, prompts_per_step=8, n_rollouts=4, max_response_tokens=192, micro_batch_tokens=2048,
           lr=2e-5, eval_every=10, save_every=5, engine_sequences=32)


def main():
    args = parse()
    flags = dict(CPU if args.cpu else GPU)
    flags["steps"] = args.steps or flags["steps"]
    args.out.mkdir(parents=True, exist_ok=True)
    limit = args.limit or (100 if args.cpu else None)
    lines = Path(args.test).read_text().splitlines(keepends=True)[:limit]
    test = args.out / "test.jsonl"
    test.write_text("".join(lines))

    curves = {}                                             # paradigm -> its run, or RUN+RUN
    for name in args.only or RUNS:
        folders = train_stages(args, name, flags, test)
        curves[name] = "+".join(map(str, folders))
        last = read_rows(folders[-1] / "metrics.jsonl")[-1]
        print(f"{name:<8} {100 * last['eval/test']:5.1f} %   response {last['eval_len/test']:.0f} tokens",
              flush=True)
    from paper import figures  # it loads torch, which no run needs here
    for figure in ("fig5", "fig6"):
        curve = [f"{name}={runs}" for name, runs in curves.items()]
        figures.main([figure, *curve, "--overwrite", "--out", str(args.out / figure)])


def train_stages(args, name, flags, test):
    """Each stage of a paradigm, from the model of the one before -> the folders of its runs."""
    model, folders, left = args.model, [], flags["steps"]
    plain = name.replace(">", "").replace("+", "_plus_")    # paper/figures.py joins runs by "+"
    for place, (method, share) in enumerate(RUNS[name], 1):
        steps = max(1, round(share * flags["steps"]))
        if place == len(RUNS[name]):
            steps = left                                    # whatever rounding has left
        left -= steps
        folder = args.out / (plain if share == 1 else f"{plain}-{method}")
        train(args, method, model, {**flags, "steps": steps}, test, folder)
        model = folder / "hf"
        folders.append(folder)
    return folders


def train(args, method, model, flags, test, folder):
    """One run of srft.py, unless it is there. Leaves with a message if what is there had other flags, or if
    the run was stopped."""
    if (folder / "hf").is_dir():
        known = json.loads((folder / "config.json").read_text())
        asked = {**flags, "model": str(model), "data": args.train}
        other = {key: known[key] for key, value in asked.items() if known[key] != value}
        if other:
            sys.exit(f"{folder} was trained with {other}; delete it, or give another --out")
        return
    command = ["srft.py", "--method", method, "--model", model, "--out", folder,
               "--data", args.train, "--eval_data", test, "--template", "tokenizer", "--rope_theta", 0,
               "--window", 0, "--no-strict_box", "--max_prompt_tokens", 300, "--resume", "--keep", 1,
               "--device", "cpu" if args.cpu else "auto"]
    for flag, value in flags.items():
        command += [f"--{flag}", value]
    print(*command, flush=True)
    torchrun = Path(sys.executable).with_name("torchrun")
    launch = [torchrun, "--standalone", "--local_addr=127.0.0.1", f"--nproc_per_node={args.ranks}"]
    subprocess.run(list(map(str, [*launch, *command])), check=True, cwd=ROOT,
                   env={"OMP_NUM_THREADS": "1"} | os.environ)
    if not (folder / "hf").is_dir():                        # a signal: srft.py ends with exit code 0
        sys.exit(f"{folder}: stopped before its end; the same command goes on with it")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub name")
    parser.add_argument("--train", required=True, help="problems with solutions")
    parser.add_argument("--test", required=True, help="held-out problems")
    parser.add_argument("--cpu", action="store_true", help="the reduced size")
    parser.add_argument("--ranks", type=positive, default=1, help="processes [%(default)s]")
    parser.add_argument("--limit", type=number_in(int, "[0, inf)"), default=0,
                        help="only the first test problems; 0: all, or 100 with --cpu")
    parser.add_argument("--steps", type=number_in(int, "[0, inf)"), default=0,
                        help="of each paradigm; 0: 200, or 20 with --cpu")
    parser.add_argument("--only", choices=tuple(RUNS), action="append",
                        help="some of the paradigms; may be repeated")
    parser.add_argument("--out", default="out/smollm2", help="folder of the runs [%(default)s]")
    args = parser.parse_args()
    if args.steps == 1:
        parser.error("--steps: 2 or more, for a sequence has two stages")
    if set(args.out) & set("+,="):
        parser.error("--out: not with +, comma or =, which join runs and name curves in paper/figures.py")
    args.model, args.train, args.out = local(args.model), local(args.train), Path(args.out).resolve()
    return args


def local(name):
    """A path that holds in every folder, since runs start in ROOT; a name of the hub as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


if __name__ == "__main__":
    main()
