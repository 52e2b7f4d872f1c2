"""What runs a training: processes, state, optimizer, log, plan, adapters, memory."""
