export { Tabulator, FilterModule, SortModule, FormatModule, InteractionModule, ResizeTableModule, ResizeColumnsModule } from "tabulator-tables";
