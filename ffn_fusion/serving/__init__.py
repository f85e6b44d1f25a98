"""Student → what an engine loads: one file a target, one table of targets, one of engines."""
