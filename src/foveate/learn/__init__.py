"""Sampled decisions into losses: returns, baselines, policy gradients. Knows tensors, nothing of vision.

returns = reward_to_go(trajectory.rewards, trajectory.mask)
advantages = returns - leave_one_out(scores, trajectory.group)
loss = policy_gradient(log_probs, trajectory.log_probs, advantages, trajectory.mask, clip=0.2).loss
"""
