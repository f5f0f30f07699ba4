"""The model: stages as four functions each. Knows nothing of lanes, collectives or other ranks' data."""
