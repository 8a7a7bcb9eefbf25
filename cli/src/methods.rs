//! `disksnap methods`: which methods there are, and what each can be told.

use disksnap::{Method, xml};
use serde::Serialize;

use crate::context::Context;
use crate::failure::Outcome;
use crate::output::{Text, table};

#[derive(Debug, Serialize)]
struct Methods {
    methods: Vec<MethodView>,
}

#[derive(Debug, Serialize)]
struct MethodView {
    name: String,
    summary: String,
    capabilities: Vec<String>,
    options: Vec<OptionView>,
}

#[derive(Debug, Serialize)]
struct OptionView {
    key: String,
    help: String,
}

pub(crate) fn run(context: &Context, wanted: Option<&str>) -> Outcome {
    let registry = disksnap::methods()?;
    if let Some(wanted) = wanted {
        let method = registry.get(wanted)?.method();
        return context
            .out
            .show(&MethodView::new(&method), || xml::methods_document([&method]));
    }
    let all: Vec<Method> = registry.iter().map(|(_, provider)| provider.method()).collect();
    let methods = all.iter().map(MethodView::new).collect();
    context
        .out
        .show(&Methods { methods }, || xml::methods_document(&all))
}

impl MethodView {
    fn new(method: &Method) -> Self {
        Self {
            name: method.name.clone(),
            summary: method.summary.clone(),
            capabilities: method.capabilities.iter().map(ToString::to_string).collect(),
            options: method
                .options
                .iter()
                .map(|option| OptionView {
                    key: option.key.clone(),
                    help: option.help.clone(),
                })
                .collect(),
        }
    }
}

impl Text for Methods {
    fn text(&self) -> String {
        let rows: Vec<Vec<String>> = self
            .methods
            .iter()
            .map(|method| vec![method.name.clone(), method.summary.clone()])
            .collect();
        table(&rows)
    }
}

impl Text for MethodView {
    fn text(&self) -> String {
        let mut text = format!(
            "{}: {}\n\nOffers, on the disks that suit it best:\n  {}\n",
            self.name,
            self.summary,
            self.capabilities.join(", ")
        );
        if !self.options.is_empty() {
            text.push_str("\nCan be told, as --disk TARGET,KEY=VALUE:\n");
            let rows: Vec<Vec<String>> = self
                .options
                .iter()
                .map(|option| vec![format!("  {}", option.key), option.help.clone()])
                .collect();
            text.push_str(&table(&rows));
        }
        text
    }
}
