"""The parts of the batcher: requests, groups, codes, and the decisions on late queries."""
