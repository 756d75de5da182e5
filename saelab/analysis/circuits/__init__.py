"""Circuits: which heads, edges and features do a task, with interventions as the judge."""
