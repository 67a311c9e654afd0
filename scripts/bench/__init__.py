"""Benchmarks behind `fusionrag bench`: each ends with one line of JSON on standard output."""
