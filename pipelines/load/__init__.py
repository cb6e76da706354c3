"""The load generator: plans, a process that sends them, dialects of servers, measures."""
