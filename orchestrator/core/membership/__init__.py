"""Who is there: agents that come and go, what engines are and should be, what is needed, and the plan for it."""
