"""Pure scheduling policy: no asyncio, no torch, no I/O. It makes `StepPlan`s and applies `StepResult`s."""
