"""From a config to a run: settings, stages, checks, summary, command line"""
