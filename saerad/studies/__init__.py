"""Radiology studies as data: the record and its splits, where studies come from, what a report says"""
