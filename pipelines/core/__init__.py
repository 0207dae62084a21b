"""Code that every room uses: errors, console, folders and locks, rows, pictures of a folder, Ray and its actor pool."""
