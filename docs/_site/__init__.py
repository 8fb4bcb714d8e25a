"""What the site has besides the pages of docs/: pages made from the code and from results."""
