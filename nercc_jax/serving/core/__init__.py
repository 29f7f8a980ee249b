"""The parts of the scheduler: requests, groups, codes, and what becomes of late queries."""
