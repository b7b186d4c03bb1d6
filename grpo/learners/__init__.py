"""The learner's side: DeepSpeed's engine, TRL's supervised trainer, sequence parallelism."""
