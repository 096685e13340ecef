"""The report of a sweep as one document: what it says (plain records), and HTML and Markdown made of the same records."""
