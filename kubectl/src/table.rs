//! Columns of text.

/// Prints rows under their titles, each column as wide as its widest cell.
pub(crate) fn print(titles: &[&str], rows: &[Vec<String>]) {
    print!("{}", text(titles, rows));
}

fn text(titles: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        let widths = cells.map(|cell| cell.chars().count());
        widths.chain([titles[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..titles.len()).map(width).collect();
    let mut all = String::new();
    let titles: Vec<String> = titles.iter().map(|&title| title.to_owned()).collect();
    for row in std::iter::once(&titles).chain(rows) {
        let cells = row.iter().zip(&widths);
        let line: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        all.push_str(line.join("   ").trim_end());
        all.push('\n');
    }
    all
}

#[cfg(test)]
mod tests {
    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [
            vec!["a".to_owned(), "b".to_owned()],
            vec!["long".to_owned(), String::new()],
        ];
        let text = super::text(&["X", "Y"], &rows);
        assert_eq!(text, "X      Y\na      b\nlong\n");
    }
}
