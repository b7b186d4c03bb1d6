"""The objectives, one file each, with `loss(logprobs, batch, algorithm)`."""
