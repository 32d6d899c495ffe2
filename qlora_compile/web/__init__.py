"""The report as one HTML file. Libraries of others lie here as they were published: see LICENSES.txt."""
