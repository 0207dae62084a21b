"""What people look at: charts, histograms, figures, contact sheets and the templates of pages."""
