"""The planner: which bytes go from which slot to which target, proved and explained. Pure NumPy."""
