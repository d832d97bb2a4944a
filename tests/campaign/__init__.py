"""The reliability campaign: random calls against float64, and runs of the trainer killed at random moments.

`scripts/campaign.py` is its command; docs/reliability.md says what is promised and has the table of the last run.
"""
