"""The paper's experiments as a person runs them: schedules, tasks, and one training loop for all."""
