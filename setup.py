"""Packaging of megam3. Tool settings are in pyproject.toml, exact pins in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "megam3/__init__.py").read_text(encoding="utf-8"), re.MULTILINE
)
assert VERSION, "megam3/__init__.py has no __version__ line"

setup(
    name="megam3",
    version=VERSION.group(1),
    description="Train multilingual retrieval encoders (dense, lexical, multi-vector), on a CPU or many GPUs",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The megam3 authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # templates stay at the top of the repository, where people edit them, and travel inside the package
    packages=[
        *find_packages(include=["megam3", "megam3.*"]),
        "megam3.recipes",
        "megam3.ds_configs",
        "megam3.slurm",
    ],
    package_dir={"megam3": "megam3", "megam3.ds_configs": "ds_configs", "megam3.slurm": "slurm"},
    package_data={
        "megam3": ["py.typed"],
        "megam3.recipes": ["*.yaml"],
        "megam3.ds_configs": ["*.json"],
        "megam3.slurm": ["*.sh", "Dockerfile", "megam3.def"],
    },
    entry_points={"console_scripts": ["megam3 = megam3.cli:main"]},
    install_requires=[
        "torch>=2.10",
        "deepspeed>=0.19.8",
        "transformers>=5.0",
        # transformers loads weights partitioned under ZeRO-3 through accelerate's DeepSpeed config
        "accelerate>=1.1",
        "bm25s>=0.2",
        "faiss-cpu>=1.9",
        "huggingface-hub>=0.34",
        "matplotlib>=3.8",
        "mpi4py>=4.0",
        "numpy>=1.26",
        # transformers reads sentencepiece models through it
        "protobuf>=4.25",
        "pyarrow>=15",
        "pydantic>=2.7",
        "pytrec-eval-terrier>=0.5.6",
        "rich>=13",
        "ruamel.yaml>=0.18",
        "safetensors>=0.4.3",
        "scipy>=1.11",
        "sentencepiece>=0.2",
        # torch.utils.tensorboard writes with its record types
        "tensorboard>=2.16",
        "tokenizers>=0.21",
    ],
    extras_require={
        # trackers behind the metrics file (megam3/obs/trackers.py)
        "wandb": ["wandb>=0.21"],
        "mlflow": ["mlflow-skinny>=3.0"],
        # the documentation as a site (docs/website/mkdocs.yml)
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"],
        # low-rank adapters (megam3/model/lora.py)
        "lora": ["peft>=0.17"],
        "dev": [
            "hypothesis>=6.100",
            "mypy>=1.11",
            "peft>=0.17",
            "psutil>=5.9",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
            # builds of torch for CUDA bring theirs; on CPUs its interpreter runs the kernel's tests. Not in
            # constraints.txt, where a pin could contradict torch's own
            "triton>=3.2; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
    },
)
