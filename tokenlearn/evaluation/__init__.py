"""Evaluations of tasks: protocols, rivals, long records and the tables made of them."""
