"""The PPO orchestrator: StartRun, GetRun, ListRuns, CancelRun, ResumeRun, WatchRun and ListSteps."""
