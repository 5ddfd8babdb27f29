//! Listings of folders, page by page.

use crate::store::{ListedObject, StoreError, StoreErrorKind};

/// Maximum number of names in a listing.
pub(crate) const MAX_LISTED: usize = 100_000;
/// Maximum number of pages of a listing. Pages may be empty.
const MAX_PAGES: usize = 1000;

/// A part of a listing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListingPage {
    /// Objects of the folder.
    pub objects: Vec<ListedObject>,
    /// Name of the next page, if there is one.
    pub next: Option<String>,
}

/// The pages of a listing so far.
#[derive(Debug, Default)]
pub(crate) struct ListedPages {
    objects: Vec<ListedObject>,
    count: usize,
}

impl ListedPages {
    /// Adds a page. Returns the name of the next one, if there is one.
    ///
    /// # Errors
    /// The listing is too long.
    pub(crate) fn add(&mut self, page: ListingPage) -> Result<Option<String>, StoreError> {
        let ListingPage { mut objects, next } = page;
        self.objects.append(&mut objects);
        self.count += 1;
        let unsupported = |message| Err(StoreError::new(StoreErrorKind::Unsupported, message));
        if self.objects.len() > MAX_LISTED {
            return unsupported(format!("there are more than {MAX_LISTED} objects"));
        }
        if next.is_some() && self.count >= MAX_PAGES {
            return unsupported(format!("the listing has more than {MAX_PAGES} pages"));
        }
        Ok(next)
    }

    /// Returns the objects of all pages.
    pub(crate) fn into_objects(self) -> Vec<ListedObject> {
        self.objects
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(objects: usize, next: Option<&str>) -> ListingPage {
        let object = ListedObject { name: "x".to_owned(), version: None };
        ListingPage { objects: vec![object; objects], next: next.map(str::to_owned) }
    }

    #[test]
    fn listings_end() {
        let mut pages = ListedPages::default();
        for _ in 1..MAX_PAGES {
            assert_eq!(pages.add(page(1, Some("n"))).unwrap().as_deref(), Some("n"));
        }
        assert_eq!(pages.add(page(1, None)).unwrap(), None);
        assert_eq!(pages.into_objects().len(), MAX_PAGES);

        let mut endless = ListedPages::default();
        let last = (0..MAX_PAGES).map(|_| endless.add(page(0, Some("n")))).last().unwrap();
        assert_eq!(last.unwrap_err().kind, StoreErrorKind::Unsupported);
        let mut long = ListedPages::default();
        assert!(long.add(page(MAX_LISTED, Some("n"))).is_ok());
        assert_eq!(long.add(page(1, None)).unwrap_err().kind, StoreErrorKind::Unsupported);
    }
}
