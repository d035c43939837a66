"""Reports of finished runs: tables, figures and the page that holds both."""
