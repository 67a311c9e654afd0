"""What an evaluation needs besides an engine: datasets, metrics, the record of a run, and its report.

Knows nothing about models, stores or HTTP; needs the standard library and numpy, and torch only where logits come in.

    datasets       published forms → Example; over json_records, which knows where a bad field stands
    metrics        answers, distributions, bootstrap intervals
    methods        how a method is spelled: knobs of the request and of the offline job; the grid of configurations
    records        one line per question and configuration; resumable; the rows of the `evaluate` command
    retrieval      a dataset's passages as one collection; recall, rank and time of each search mode
    report         tables for a terminal, paired differences, the quality figure
"""
