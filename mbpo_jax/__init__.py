"""World-model reinforcement learning for robot policies, in JAX."""

__version__ = "0.1.0"
