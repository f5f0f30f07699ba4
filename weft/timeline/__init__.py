"""What happened (or would happen) when: events on lanes, and how to look at them. No torch."""
