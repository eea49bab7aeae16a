"""The optimizer that is wrapped: what is inside it, how to build another like it, several as one."""
