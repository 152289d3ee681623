"""The job table and its neighbours: the one place where the service keeps state that must survive."""
