"""The method beside others: the same demonstrations, fine-tuned policy, rollouts and start states
(docs/comparisons.md).

The names and what each does are here, so that --help need not load JAX; `methods.py` runs them.
"""

DESCRIPTIONS = {
    "sft": "the fine-tuned policy, where all others start",
    "noiseless": "the fine-tuned policy without initial noise: a control",
    "bc_on_rollouts": "SFT goes on, with successful rollouts: the control",
    "bc_in_world_model": "SFT goes on, with imagined branches that the model judges successful",
    "vla_mbpo": "PPO on branches in the world model, as the config says",
    "vla_mbpo_1": "the same with branches of 1 chunk",
    "vla_mbpo_2": "the same with branches of 2 chunks",
    "vla_mbpo_4": "the same with branches of 4 chunks",
    "vla_mbpo_full_horizon": "the same with whole episodes, from their start",
    "ranked": "SFT goes on, with those of some chunks that imagination ranks highest",
    "ranked_control": "the same with some of them at random",
    "ranked_noiseless": "the policy of ranked without initial noise, as noiseless",
    "ranked_control_noiseless": "that of ranked_control without initial noise",
    "best_of_n": "no training: the best of N imagined chunks is executed",
    "ranked_best_of_n": "the same with the policy of ranked",
    "online_ppo": "PPO in the simulator, with as many episodes as there are rollouts",
    "online_ppo_large": "PPO in the simulator, with many times as many episodes: an upper line",
    "mopo": "vla_mbpo minus β times the disagreement of dynamics members",
    "mobile": "vla_mbpo minus β times the disagreement of values after dynamics members",
    "idql": "no policy training: of N chunks the one with the highest Q, from recorded data alone",
    "recap": "SFT goes on, with all rollouts, each chunk labelled by whether it gained time",
    "reinbot": "SFT goes on, with all rollouts, each chunk behind the return that followed",
}
DEFAULT = (
    "sft",
    "noiseless",
    "bc_on_rollouts",
    "bc_in_world_model",
    "vla_mbpo",
    "ranked",
    "ranked_control",
    "best_of_n",
)
