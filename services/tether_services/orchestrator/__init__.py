"""The PPO orchestrator: StartRun, GetRun, ListRuns, CancelRun, ResumeRun and WatchRun."""
