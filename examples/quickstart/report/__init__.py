"""The quickstart's report: report.json for programs, report.html for people, a table for the terminal."""
