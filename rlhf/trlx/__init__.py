"""trlX itself as PPO's engine (`ppo.engine: trlx`), and its configurations read into ours (`rlhf import-trlx`)."""
