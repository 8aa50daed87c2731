"""Filters for noisy alt text (Jia et al., ALIGN, 2021) over shards too large for memory.

Three passes: rows of every sample into Parquet files; counts over all of them; verdicts and filtered shards.
"""
