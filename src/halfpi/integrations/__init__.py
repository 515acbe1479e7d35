"""halfpi inside other frameworks: LeRobot's π0.5 with another sampler, and openpi's policy."""
