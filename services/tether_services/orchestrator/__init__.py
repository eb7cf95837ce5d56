"""The PPO orchestrator: StartRun, GetRun, ListRuns, CancelRun, ResumeRun, RollbackRun, WatchRun and ListSteps."""
