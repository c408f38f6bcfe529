from pathlib import Path

from setuptools import find_packages, setup

lines = Path("minitrain/__init__.py").read_text().splitlines()
version = next(line.split('"')[1] for line in lines if line.startswith("__version__"))

setup(
    name="minitrain",
    version=version,
    description="A pure-PyTorch minimal trainer library for post-training language models",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["minitrain", "minitrain.*"]),
    package_data={"": ["*.txt"], "minitrain": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.10",
        "transformers>=5.3",  # CVE-2026-4372: before it, a config.json could run code
        "safetensors>=0.5",
        "omegaconf>=2.3",
        "wandb>=0.19",
        "tqdm>=4.66",
    ],
    extras_require={
        "tensorboard": ["tensorboard>=2.16"],
        "trackio": ["trackio>=0.20"],
        "mlflow": ["mlflow>=3.1"],
        "quant": ["bitsandbytes>=0.48"],
        "torchao": ["torchao>=0.15"],  # model.float8, and optimizers with 8-bit and 4-bit states
        "data": ["datasets>=3"],
        "vllm": ["vllm>=0.17"],  # the server of rollout.engine=vllm
        "peft": ["peft>=0.17"],  # what `minitrain check` compares adapters with
        "plot": ["matplotlib>=3.8"],
        "stats": ["scipy>=1.15"],  # intervals of `minitrain evaluate --compare`
        "lm-eval": ["lm-eval>=0.4.9"],  # `minitrain evaluate --tasks`
        "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0", "ruff>=0.11"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.11",
            "mypy>=1.10",
            "tensorboard>=2.16",
            "bitsandbytes>=0.48",
            "torchao>=0.15",
            "peft>=0.17",
            "matplotlib>=3.8",
            "scipy>=1.15",
            "datasets>=3",
            "nbclient>=0.10",  # runs example/notebook.ipynb
            "ipykernel>=6",
            "trl>=1.16; python_version >= '3.11'",  # its chat templates are read, nothing else
        ],
    },
    entry_points={"console_scripts": ["minitrain=minitrain.cli.main:run"]},
)
