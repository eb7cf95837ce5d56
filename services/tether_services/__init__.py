"""The services of tether: generator, reward, reference and orchestrator."""

import os

# Set before gRPC is loaded. Its handlers would run in the child of every fork that uvloop makes to start a process, and
# end about one child in 400 with signal 11 before it begins. No process here goes on to use gRPC after a fork.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
