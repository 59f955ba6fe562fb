"""The parts that ``run.sh`` runs, once packages are installed."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.gpu.runner import Part, Runner, read_json, read_lines  # noqa: E402

PROCESSES = min(12, os.cpu_count() or 1)  # of the tests, which share the GPU


def main() -> int:
    parser = argparse.ArgumentParser(prog="bash tests/gpu/run.sh")
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hf-path", type=Path)
    parser.add_argument("--only", nargs="+", default=[])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(
            number, lambda *_: sys.exit("ended from outside; gpu.json has what was found")
        )
    runner = Runner(args.out / "gpu.json", args.out / "logs", cwd=ROOT, seconds=args.seconds)
    parts = all_parts(args.out, args.hf_path)
    if unknown := set(args.only) - {part.name for part in parts}:
        parser.error(f"--only: no part is called {', '.join(sorted(unknown))}.")
    chosen = [p for p in parts if not args.only or p.name in args.only or p.is_needed]
    passed = runner.run(chosen)
    print(f"{'all passed' if passed else 'not all passed'}; figures and versions: {runner.path}")
    return 0 if passed else 1


def all_parts(out: Path, hf_path: Path | None) -> list[Part]:
    """In the order of what is most wanted; later parts use what earlier ones made in ``out``."""
    python, work = sys.executable, out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    own = [] if hf_path is None else ["--hf-path", str(hf_path)]
    parts = [
        Part(
            "environment",
            [python, "tests/gpu/environment.py", str(work / "environment.json")],
            90,
            read_json(work / "environment.json"),
            is_needed=True,
        )
    ]
    if importlib.util.find_spec("megatron_mod.doctor"):
        doctor = work / "doctor.json"
        command = [python, "-m", "megatron_mod.doctor", "--json", str(doctor)]
        parts.append(Part("doctor", command, 60, read_json(doctor)))
    parts += [
        Part(
            "prepare",
            [python, "-m", "tests.gpu.prepare", "--out", str(work), *own],
            60,
            read_json(work / "prepared.json"),
            is_needed=True,
        ),
        tests(work),
        *(Step(python, work, hf_path).parts()),
    ]
    return parts


def tests(work: Path) -> Part:
    """All gpu tests, some files at a time where that is possible."""
    results = work / "results.jsonl"
    os.environ["MEGATRON_MOD_GPU_RESULTS"] = str(results)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    command += ["-p", "no:cacheprovider"]
    command += ["--junitxml", str(work / "junit.xml"), "--show-capture=no"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(PROCESSES), "--dist", "loadfile"]
    return Part("tests", command, 300, lambda: outcomes(results))


def outcomes(results: Path) -> dict:
    """Of the tests that have come to an end: counts, and all of those that did not pass."""
    records = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    counts = Counter(record["outcome"] for record in records)
    slowest = sorted(records, key=lambda record: -record["seconds"])[:10]
    return {
        "summary": ", ".join(f"{number} {name}" for name, number in sorted(counts.items())),
        "counts": dict(counts),
        "failed": [r for r in records if r["outcome"] == "failed"],
        "skipped": Counter(r["why"][-300:] for r in records if r["outcome"] == "skipped"),
        "slowest": {record["test"]: round(record["seconds"], 1) for record in slowest},
    }


class Step:
    """A model's way through conversion, training, export and use, and the benchmarks."""

    def __init__(self, python: str, work: Path, hf_path: Path | None) -> None:
        self.python, self.work = python, work
        self.model = hf_path or work / "model"
        self.docs = work / "docs"

    def parts(self) -> list[Part]:
        work, base, run, export = (
            self.work,
            self.work / "base",
            self.work / "run",
            self.work / "export",
        )
        fast = ["--rounds", "2", "--steps", "1"]
        return [
            self.tool(
                "conversion", 60, "convert_hf_to_megatron", "--hf-path", self.model, "--save", base
            ),
            self.tool(
                "logits",
                90,
                "compare_logits",
                "--load",
                base,
                "--hf-path",
                self.model,
                "--json",
                work / "logits.json",
                figures=read_json(work / "logits.json"),
            ),
            self.tool(
                "conversion back",
                60,
                "convert_megatron_to_hf",
                "--load",
                base,
                "--save",
                work / "back",
            ),
            self.script(
                "equal weights", 60, "-m", "tests.gpu.same_weights", self.model, work / "back"
            ),
            self.training("training", run, 20),
            self.training("training goes on", run, 24),
            self.tool(
                "export",
                60,
                "convert_megatron_to_hf",
                "--load",
                run,
                "--base",
                base,
                "--save",
                export,
            ),
            self.tool(
                "logits of the export",
                90,
                "compare_logits",
                "--load",
                run,
                "--hf-path",
                export,
                "--json",
                work / "export_logits.json",
                figures=read_json(work / "export_logits.json"),
            ),
            self.script(
                "generation",
                90,
                "-m",
                "tests.gpu.generate",
                export,
                "--json",
                work / "generation.json",
                figures=read_json(work / "generation.json"),
            ),
            *(
                self.tool(
                    f"evaluation of the {name}",
                    90,
                    "evaluate",
                    "--load",
                    folder,
                    "--perplexity",
                    self.docs / "held_out.jsonl",
                    "--dtype",
                    "bfloat16",
                    "--batch-size",
                    "8",
                    "--max-length",
                    "512",
                    "--json",
                    work / f"{name}.json",
                    figures=read_json(work / f"{name}.json", "perplexity", "capacity"),
                )
                for name, folder in (("run", run), ("export", export))
            ),
            self.benchmark("routing", 90, "--sizes", "small", "--repetitions", "3"),
            self.benchmark(
                "routing",
                90,
                "--sizes",
                "small",
                "--repetitions",
                "3",
                "--training",
                name="routing in training",
            ),
            self.benchmark(
                "training",
                180,
                "--hf-path",
                self.model,
                "--data",
                self.docs / "train.jsonl",
                "--ways",
                "published_stop",
                "recompute",
                "cached",
                "sparse",
                *fast,
            ),
            self.benchmark(
                "inference",
                120,
                "--shapes",
                "llama3-8b",
                "--granularity",
                "attn_token",
                "--capacity",
                "0.5",
                "--batches",
                "1",
                "8",
                "--contexts",
                "512",
                "--repetitions",
                "3",
                "--new-tokens",
                "8",
            ),
            self.tool(
                "benchmark conversion",
                90,
                "benchmark/conversion",
                "--gigabytes",
                "2",
                figures=read_lines(work.parent / "logs" / "benchmark_conversion.log", 5),
            ),
        ]

    def training(self, name: str, run: Path, steps: int) -> Part:
        settings = {
            "model.checkpoint": self.work / "base",
            "data.train": self.docs / "train.jsonl",
            "data.validation": self.docs / "validation.jsonl",
            "data.max_length": 512,
            "data.on_bad_record": "skip",
            "data.cache": self.work / "cache",
            "train.steps": steps,
            "train.global_batch_size": 16,
            "train.micro_batch_size": 8,
            "train.validation_interval": 10,
            "router.granularity": "block_token",
            "router.layers": "{every: 2}",
            "checkpoint.save": run,
            "checkpoint.interval": 10,
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        figures = read_json(run / "summary.json")
        return self.script(name, 150, "launch/pretrain_router.py", *options, figures=figures)

    def benchmark(self, which: str, seconds: float, *options: object, name: str = "") -> Part:
        title = f"benchmark {name or which}"
        path = self.work / f"{title.replace(' ', '_')}.json"
        return self.tool(
            title, seconds, f"benchmark/{which}", *options, "--json", path, figures=read_json(path)
        )

    def tool(
        self, name: str, seconds: float, which: str, *options: object,
        figures: Callable[[], dict] | None = None,
    ) -> Part:  # fmt: skip
        return self.script(name, seconds, f"tools/{which}.py", *options, figures=figures)

    def script(
        self, name: str, seconds: float, *words: object, figures: Callable[[], dict] | None = None
    ) -> Part:
        return Part(name, [self.python, *map(str, words)], seconds, figures)


if __name__ == "__main__":
    sys.exit(main())
