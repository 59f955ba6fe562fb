"""Holds the modelling file that an export carries; nothing here is imported by the trainer."""
