"""The compiled plan of an engine, read from its builder's log (docs/plan.md)."""
